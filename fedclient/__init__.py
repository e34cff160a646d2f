"""The client daemon: it trains on local data and sends updates; the data stays."""
