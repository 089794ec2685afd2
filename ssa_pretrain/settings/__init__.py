"""What both command lines share, ssa_pretrain's and data_prep's; knows no model and no dataset."""
