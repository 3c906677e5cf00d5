"""The conformance kit: what the author of a stage or a policy runs in a test, without a GPU."""
