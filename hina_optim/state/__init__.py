"""What is remembered and how: slots, precision, loading and saving."""
