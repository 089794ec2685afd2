"""The command-line front end that ssa_pretrain and data_prep share. Knows no model and no dataset."""
