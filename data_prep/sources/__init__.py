"""Where text comes from. A source yields parts of the corpus: named lists of files that the readers understand."""
