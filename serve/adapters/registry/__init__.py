"""Names, versions and settings in a database: tables, changes, snapshots, backup.

Bytes of adapters are in the store beside it.
"""
