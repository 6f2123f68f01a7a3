"""How fast is it, next to others?  python -m bench train"""
