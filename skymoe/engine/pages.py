"""The page table: which page of the key/value cache holds which tokens of whom. No torch."""
