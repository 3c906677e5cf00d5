"""The operations of one retrieval step: a plain torch reference each, and kernels beside it where they exist.

Torch and triton only; this package never imports kvframe. Letters: B batch, Hq query heads, H key/value heads, D head
width, U units, R rows of the pool, C resident slots, N attention slots, T tokens.
"""
