"""Places that the server fetches an adapter from, each by its address.

An address is judged as a text, then read into a folder with so many bytes and seconds. Who may push decides it.
"""
