"""Files -> raw rows (read/) -> examples (chat/, store/) -> batches (batch/); a look (inspect)."""
