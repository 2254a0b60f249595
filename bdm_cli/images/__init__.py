"""Images on disk: where they lie, how they are cropped, sets of them to score."""
