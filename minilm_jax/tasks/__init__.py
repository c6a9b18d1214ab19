"""The papers' tasks: official files → examples → features → predictions → the official metric."""
