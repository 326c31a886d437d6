"""A version on its way: upload to removal, canary, shadow, traffic split, promotion, rollback, registry sync.

Every change to what is live is made here. No HTTP lives here.
"""
