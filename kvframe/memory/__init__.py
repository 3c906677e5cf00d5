"""Where KV lies: row pool, ledger, resident slots, and the all-on-device memory of the `dense` execution."""
