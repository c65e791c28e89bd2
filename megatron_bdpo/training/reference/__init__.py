"""The reference of a run: scored and kept, or resident."""
