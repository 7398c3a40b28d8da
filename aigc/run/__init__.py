import sys

# nbformat imports jsonschema, and that, where it finds it, rfc3987_syntax: a grammar of IRIs, built anew in 2.5 s of each process. No notebook has one.
sys.modules.setdefault("rfc3987_syntax", None)
