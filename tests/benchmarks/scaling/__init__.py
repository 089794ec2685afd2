"""Speed of the 1B model on several GPUs of one host: `python -m benchmarks.scaling`, with tests/ on PYTHONPATH.

Reading order: __main__, cases, jobs, worker, steps, exchange, saving, restart, judged, tables.
"""
