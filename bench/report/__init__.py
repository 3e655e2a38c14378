"""Records of measurements, and the tables, figures and page made of them."""
