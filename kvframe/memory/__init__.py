"""Where KV lies: the row pool, the ledger, the resident slots, and the all-on-device memory of the `dense` execution."""
