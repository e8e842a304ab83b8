//! Nothing to call: this package is its tests, which read the source of all the others.
