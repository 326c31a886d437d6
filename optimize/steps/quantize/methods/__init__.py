"""How weights are rounded: one method a module, as `METHOD`.

What a method computes with torch is imported when it is called.
"""
