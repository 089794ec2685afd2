"""The plan of a run: steps, layout, parameters, memory and operations; and on a cluster: time, communication, price and better layouts.

Reading order: plan, memory, flops, table; then work, communication, measured, calibration, estimate; then search, scaling, goodput, estimate_table.
"""
