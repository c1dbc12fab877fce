# The whole of a training in one call; opt.pyx includes this.

def fit(Sched sched not None, Tensor inputs not None, Tensor outputs not None, OptDataset dataset not None, *,
        loss_type=OptLossType.CROSS_ENTROPY, optimizer=None, nepoch=1, nbatch_logical=0,
        double val_split=0.0, callback=None):
    """Return the results of the last epoch, (train, validation), after nepoch epochs over shuffled data.

    nbatch_logical: datapoints for each step of the optimiser, a multiple of the inputs' batch, which it is if 0.
    val_split: share of the datapoints that is not trained with.  callback: as OptContext.epoch's.
    Raises: as OptContext and its epoch(); ParameterError for numbers out of range.
    Wraps: ggml_opt_fit.
    """
    cdef int64_t n_batch = inputs.ptr().ne[1], ndata = dataset.ndata, split
    nbatch_logical = index(nbatch_logical) or n_batch
    if index(nepoch) < 1 or not 0 <= val_split < 1:
        raise ParameterError(f"fit: nepoch = {nepoch} must be at least 1, and val_split = {val_split} 0 to below 1")
    if nbatch_logical < 1 or n_batch < 1 or nbatch_logical % n_batch or ndata % nbatch_logical:
        raise ShapeError(f"fit: {ndata} datapoints, steps of {nbatch_logical} and batches of {n_batch} do not divide")
    split = int((1 - val_split) * (ndata // nbatch_logical)) * nbatch_logical
    results = OptResult(), OptResult()
    with OptContext(sched, inputs, outputs, loss_type=loss_type, optimizer=optimizer,
                    opt_period=nbatch_logical // n_batch) as opt:
        if nbatch_logical < ndata:
            dataset.shuffle(opt)
        for _ in range(nepoch):
            if nbatch_logical < split:
                dataset.shuffle(opt, split)
            for result in results:
                result.reset()
            opt.epoch(dataset, *results, split, callback, callback)
    return results
