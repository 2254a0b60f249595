"""The paper's tables: its numbers (cells.csv), what its columns mean (tables.toml), ours beside them (tables.py)."""
