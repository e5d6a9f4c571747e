"""`hicache-io stress`: load that forces eviction and write-back, with every output checked.

`load` says what is asked, `client` asks it, `account` judges and counts the answers, `side` drives one server
and notices when it hangs or dies, `run` drives one or two of them, `report` shows what came out.
"""
