"""The data path: seqio tasks become token stores once; training then reads rows by number."""
