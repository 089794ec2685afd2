"""A real run of `ssa_pretrain.train` on which a bit of a weight flips: arguments RANK and STEP, then the command line."""

import os
import sys

from ssa_pretrain import train, trainer
from ssa_pretrain.checkpoint.sharded_weights import named_weights

if __name__ == "__main__":
    rank, when = int(sys.argv[1]), int(sys.argv[2])
    sys.argv[1:3] = []
    train_step = trainer.train_step

    def flipping_step(run, step):
        """Flips the sign of one weight before a step, then trains."""
        if step == when and int(os.environ["RANK"]) == rank:
            weights = dict(named_weights(run.engine.models, run.config))
            weights["decoder.layers.1.mlp.linear_fc2.weight"].data.view(-1)[7] *= -1
        return train_step(run, step)

    trainer.train_step = flipping_step
    train.main()
