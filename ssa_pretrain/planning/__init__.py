"""The plan of a run: steps, layout, parameters, memory and operations. Reading order: plan, memory, flops, table."""
