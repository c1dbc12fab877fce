/* Compiled before each extension module: a C integer can be made of what has __index__, as everywhere in Python, where
   Cython would take what has __int__, and cut 8.5 down to 8. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#define nb_int nb_index
