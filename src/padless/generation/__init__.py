"""What one `generate` call decodes with: keys and values of real tokens, a length for each row."""
