"""From raw text to clean text: steps over shards of documents, each of them a pure function with settings."""
