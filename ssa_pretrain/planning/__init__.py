"""What a run will need: steps, layout, parameters, memory and operations. Reading order: plan, memory, flops, table."""
