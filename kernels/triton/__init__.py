"""The Triton forms of the ops: one module an op, imported when the form first runs, over a few shared kernels."""
