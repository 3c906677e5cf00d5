"""Text whose words are the vocabulary of the tiny model."""

TEXT = "the quick brown fox jumps over the lazy dog while a small grey cat sleeps under the old table . "
