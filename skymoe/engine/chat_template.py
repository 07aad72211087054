"""A conversation -> the prompt, by the template in the model's directory. No torch."""
