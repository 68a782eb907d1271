"""Closures and images: what a program really needs, made into a root directory, a container or a microVM.

Imports nouns, `decide` and `meter` only: what starts things is handed in.
"""
