// How the site's search orders its results: short answers first, pages about loradock's own code and proofs last.
var Scorer = {
  score: ([page, , , , score]) =>
    /^(lab\/|architecture|decisions|upstream|contributing|benchmarks)/.test(page) ? score / 10 : page === "how-do-i" ? 2 * score : score,
  // The rest is Sphinx's own.
  objNameMatch: 11, objPartialMatch: 6, objPrio: { 0: 15, 1: 5, 2: -5 }, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};
