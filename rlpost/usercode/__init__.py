"""Users' own functions, `file.py:function`, called where they can neither end nor hold up a run."""
