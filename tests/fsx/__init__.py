"""Random operations with mappings on files of a mount, compared with memory: `fs3-fsx`, after `fsx` of the XFS tests.

`make fsx OPS=… SEED=…` is the long campaign, `test_fsx.py` a short one of the same code.
"""
