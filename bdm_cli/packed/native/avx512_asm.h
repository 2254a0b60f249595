/* Pieces of the inline assembly of the AVX-512 kernels. */
#ifndef BDM_AVX512_ASM_H
#define BDM_AVX512_ASM_H

#define EVERY_REGISTER \
    "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11", "zmm12", "zmm13", \
    "zmm14", "zmm15", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20", "zmm21", "zmm22", "zmm23", "zmm24", "zmm25", "zmm26", \
    "zmm27", "zmm28", "zmm29", "zmm30", "zmm31"
#define ZERO(a) "vpxord %%zmm" #a ",%%zmm" #a ",%%zmm" #a "\n"
/* The sums begin at 0 if `fresh`, else where they were left. */
#define BEGIN(zero, load) "test %[fresh],%[fresh]\n je 2f\n" zero "jmp 3f\n 2:\n" load "3:\n"

#endif
