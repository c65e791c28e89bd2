"""What the tests share: warm ranks, small jobs, and whole weights assembled from shards."""
