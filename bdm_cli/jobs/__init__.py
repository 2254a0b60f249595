"""Jobs: one file and one run(...) per subcommand. They meet only on disk."""
