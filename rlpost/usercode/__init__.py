"""Users' functions, `file.py:function`, called in processes of their own so that they cannot end or block a run."""
