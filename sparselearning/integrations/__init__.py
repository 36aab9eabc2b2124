"""Sparse training inside the trainers of other libraries; each module imports its library, and nothing imports them."""
