"""Measures of what the models make: the VAE's reconstruction, and the adherence of Shapes World clips to prompts."""
