"""Who is asked: installed backends, subjects in processes of their own, and a right one in NumPy."""
