"""Images in: sources and the pipeline from files to batches."""
