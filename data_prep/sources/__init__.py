"""Where text comes from. A source yields subsets: named lists of files that the readers understand."""
