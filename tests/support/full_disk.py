"""`python -m ssa_pretrain.train`, except that no file may grow past 1 MB: a full disk, as the writers see it. Arguments: the command line's overrides."""

import resource

from ssa_pretrain.train import main

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    main()
