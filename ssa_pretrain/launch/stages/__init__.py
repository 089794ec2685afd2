"""The two stages of a recipe and what comes before and after them, in one command that can be run again at any point."""
