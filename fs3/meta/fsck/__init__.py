"""The audit of everything that the metadata store and the storage services hold, while the cluster is used.

A *look* examines one thing in one transaction, so what it says was true at one moment. A thing that looks wrong is
looked at again, LOOKS times in all with pauses between, and reported only if it was wrong each time. What cannot be
seen in one transaction (all names of an inode, all replicas of a chunk) counts only if nothing of it changed meanwhile.

Memory is bounded whatever the size of the namespace: tables are read in pages in key order, names are counted by an
external sort of the inodes they name, and suspects are settled SUSPECTS_MAX at a time.
"""
