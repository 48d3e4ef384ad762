"""From raw sources to fixed-length training records, and from records to batches."""
