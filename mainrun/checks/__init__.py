"""Work that is done again and compared: guards, the audit of a store, repeated growth."""
